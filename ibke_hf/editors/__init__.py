"""Baseline editors, all called by ``editor.edit(model, tokenizer, requests, mode=..., previous=...) -> Edit``.

One file per editor, its hyper-parameters beside it; import the file that is needed, such as :mod:`ibke_hf.editors.ft`.
"""
