"""Who computes what: optimizers of many libraries against their authors' code."""
