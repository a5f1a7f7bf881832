from hf_hybrid.recipes.inspect_activations import main

if __name__ == "__main__":
    main()
