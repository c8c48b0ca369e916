"""How do shards become batches? Decoding, transforming, logging what was drawn; knows nothing of models."""

if __name__ != "iwm_fast.pipelines":
    # under a second name every class would exist twice
    raise ImportError("the folder pipelines/ is imported as iwm_fast.pipelines, got " + __name__)
