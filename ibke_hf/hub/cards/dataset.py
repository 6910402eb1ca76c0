"""The card of a dataset of records: what is in each split, its columns, how to load it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from huggingface_hub import DatasetCard, DatasetCardData

from ...evaluation.report.tabular import markdown_table

ROWS = "data"  # folder of the rows as Parquet, for `datasets`


def dataset_card(repo_id: str, numbers: Mapping[str, Mapping[str, int]], **metadata: Any) -> DatasetCard:
    """Write the card of a dataset of records: what is in each split, its columns, how to load it.

    Args:
        repo_id: Where it is published.
        numbers: By split, the number of records, requests, generality and locality cases.
        metadata: Metadata of the card.
    """
    files = [{"split": name, "path": f"{ROWS}/{name}.parquet"} for name in numbers]
    data = DatasetCardData(
        **{
            "tags": ["knowledge-editing", "model-editing", "ibke-hf"],
            "task_categories": ["text-generation"],
            "configs": [{"config_name": "default", "data_files": files}],
            **metadata,
        }
    )
    columns = list(next(iter(numbers.values())))
    table = markdown_table(
        ["split", *columns], [[name, *(f"{row[column]:,}" for column in columns)] for name, row in numbers.items()]
    )
    first = next(iter(numbers))
    text = f"""# {repo_id.rpartition("/")[2]}

Records for editing facts in language models: each has one or more edit requests, generality cases, whose answer must
follow from the edit, and locality cases, whose answer must not change.

{table}

Rows, with requests, cases and hops as lists:

```python
import datasets

rows = datasets.load_dataset("{repo_id}", split="{first}")
```

Records, read from the files of each domain one after another:

```python
from ibke_hf.data.sources import read_records

records = read_records("{repo_id}", split="{first}")
```

Columns: `id`, `dataset`, `domain`, `requests` (`prompt`, `target`, `subject`), `generality` and `locality` (`prompt`,
`target`, `criteria`, `hops`, `top_k`, `aliases`, `supporting`, `facts`, `name`), `edits` (the requests as triples),
`kind` (counterfactual, or unknown to the model), `relation`, `metadata`.
"""
    return DatasetCard(f"---\n{data.to_yaml()}\n---\n\n{text}")
