from hf_hybrid.recipes.tokenize_text import main

if __name__ == "__main__":
    main()
