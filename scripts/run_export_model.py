from hf_hybrid.recipes.export_model import main

if __name__ == "__main__":
    main()
