from hf_hybrid.recipes.pretrain_span_corruption import main

if __name__ == "__main__":
    main()
