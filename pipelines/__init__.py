"""How do shards become batches? Reading, decoding, transforming and logging of samples; independent of any model."""

if __name__ != "iwm_fast.pipelines":
    # Imported under a second name, every class would exist twice and isinstance checks would fail.
    raise ImportError("the folder pipelines/ is imported as iwm_fast.pipelines, got " + __name__)
