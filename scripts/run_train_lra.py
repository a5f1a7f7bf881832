from hf_hybrid.recipes.train_lra import main

if __name__ == "__main__":
    main()
