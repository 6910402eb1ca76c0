"""Baseline editors behind the one interface ``editor.edit(model, tokenizer, requests, mode=..., previous=...) -> Edit``.

One file per editor, its hyper-parameters beside it; import the file that is needed, such as :mod:`ibke_hf.editors.ft`.
"""
