from hf_hybrid.recipes.train_synthetic import main

if __name__ == "__main__":
    main()
