"""One module per weight family: its config fields, weight table and defaults. Each defines the tuple `FAMILIES`."""
