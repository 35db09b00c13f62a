"""One file a family: facts and rules. Each names its `FAMILIES`."""
