from hf_hybrid.recipes.classify_audio import main

if __name__ == "__main__":
    main()
