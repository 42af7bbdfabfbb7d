"""What `fathom.data.prepare` does, pass by pass (report §4.1); `making` is the order of the passes.

    plan            settings, files, units of work; nothing is read yet
    reading         files to clean text, hashes, signatures
    deduplication   which documents repeat others (`signatures`, `duplicates`)
    encoding        text to tokens, a stretch at a time
    packing         tokens to shards, in the order of training
    result          the folder: shards, tokenizer, rejects, manifest

`work` holds what is finished, so that a killed preparation goes on; `workers` are the processes.
"""
