from hf_hybrid.recipes.convert_checkpoint import main

if __name__ == "__main__":
    main()
