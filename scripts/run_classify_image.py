from hf_hybrid.recipes.classify_image import main

if __name__ == "__main__":
    main()
