from hf_hybrid.recipes.reproduce import main

if __name__ == "__main__":
    main()
