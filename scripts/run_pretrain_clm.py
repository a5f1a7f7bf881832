from hf_hybrid.recipes.pretrain_clm import main

if __name__ == "__main__":
    main()
