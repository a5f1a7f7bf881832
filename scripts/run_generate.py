from hf_hybrid.recipes.generate import main

if __name__ == "__main__":
    main()
