from hf_hybrid.recipes.pretrain_mlm import main

if __name__ == "__main__":
    main()
