from hf_hybrid.recipes.demo import main

if __name__ == "__main__":
    main()
