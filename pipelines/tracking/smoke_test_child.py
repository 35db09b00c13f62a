"""A registered version in a process of its own: does it load without unpickling, and what does it say?

    python -P smoke_test_child.py FOLDER < {"image": [base64, ...], "prompt": [...]}

Prints one JSON object, the errors of the pictures (null for a caption), last on stdout. This file is run, not imported:
it must not load any module of ours, because the version brings the code that it was registered with.
"""

import json
import sys


def main(folder: str) -> None:
    """Load the model of a folder as a server does, and caption what stdin holds."""
    import mlflow.pyfunc
    import pandas as pd
    import torch

    def forbid(event: str, arguments: object) -> None:
        if event == "pickle.find_class":
            raise RuntimeError(f"loading the model unpickles {arguments}")

    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError("loading the model calls torch.load, which unpickles")

    torch.load = refuse
    sys.addaudithook(forbid)
    model = mlflow.pyfunc.load_model(folder)
    answers = model.predict(pd.DataFrame(json.load(sys.stdin)))
    errors = [None if pd.isna(error) else str(error) for error in answers["error"]]
    print(json.dumps({"errors": errors}))  # noqa: T201 (what the parent reads)


if __name__ == "__main__":
    main(sys.argv[1])
