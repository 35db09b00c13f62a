"""Scripts that execute the code of a registered model version, each in a process without credentials. No script imports
a Lakesight package, because the version brings its own copy of the code.
"""
