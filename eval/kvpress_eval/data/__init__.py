"""Where benchmark files come from: a local folder, or packages that are fetched once; each checked by its sha256."""

from kvpress_eval.data.files import Data, data_folder

__all__ = ["Data", "data_folder"]
