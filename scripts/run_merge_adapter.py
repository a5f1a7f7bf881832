from hf_hybrid.recipes.merge_adapter import main

if __name__ == "__main__":
    main()
