"""The mathematics of A*PO: tensors in, tensors out. No files, no processes, no Megatron; imports with torch alone."""
