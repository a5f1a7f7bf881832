from hf_hybrid.recipes.push_to_hub import main

if __name__ == "__main__":
    main()
