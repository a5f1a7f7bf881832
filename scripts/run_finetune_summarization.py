from hf_hybrid.recipes.finetune_summarization import main

if __name__ == "__main__":
    main()
