"""What needs PyTorch and transformers (`pip install 'lora-compress[torch]'`): nothing else of this package imports
them.
"""
