from hf_hybrid.recipes.generate_lra import main

if __name__ == "__main__":
    main()
