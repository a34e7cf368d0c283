"""Reward histories as other programs write them."""

import json

import numpy as np
import pyarrow as pa

from trl_learnalign.records.store import write_table


def write_history(path, history):
    """A history as Parquet or JSON, by the ending."""
    if path.suffix == ".json":
        rows = zip(history.indices.tolist(), history.rates.tolist(), strict=True)
        lists = {str(i): [None if np.isnan(rate) else rate for rate in rates] for i, rates in rows}
        path.write_text(json.dumps(lists))
        return
    count, passes = history.rates.shape
    columns = {}
    if history.prompt_ids is not None:
        columns["prompt_id"] = np.repeat(np.array(history.prompt_ids, dtype=object), passes)
    if history.indices is not None:
        columns["index"] = np.repeat(history.indices, passes)
    rates = history.rates.ravel()
    columns["pass"] = np.tile(np.arange(passes), count)
    write_table(path, pa.table({**columns, "success_rate": pa.array(rates, mask=np.isnan(rates))}))
