from hf_hybrid.recipes.lm_eval import main

if __name__ == "__main__":
    main()
