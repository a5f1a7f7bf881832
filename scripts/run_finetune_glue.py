from hf_hybrid.recipes.finetune_glue import main

if __name__ == "__main__":
    main()
