"""`python -m lora_compress`."""

from lora_compress.cli import main

if __name__ == "__main__":
    main()
