from hf_hybrid.recipes.train_tokenizer import main

if __name__ == "__main__":
    main()
