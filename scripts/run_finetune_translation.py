from hf_hybrid.recipes.finetune_translation import main

if __name__ == "__main__":
    main()
