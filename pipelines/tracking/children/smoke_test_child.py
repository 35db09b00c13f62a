"""Child process of the smoke test: load a registered version without unpickling, and caption pictures.

    python -P smoke_test_child.py FOLDER < {"image": [base64, ...], "prompt": [...]}

The last line on stdout is a JSON object with the error of each picture, which is null if the picture was captioned.
This script must not import any Lakesight package, because the version brings its own copy of the code.
"""

import json
import sys


def main(folder: str) -> None:
    """Load the model in a folder in the same way as a model server, and caption the pictures given on stdin."""
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
    print(json.dumps({"errors": errors}))  # noqa: T201 (read by the parent process)


if __name__ == "__main__":
    main(sys.argv[1])
