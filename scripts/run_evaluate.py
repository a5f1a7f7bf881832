from hf_hybrid.recipes.evaluate import main

if __name__ == "__main__":
    main()
