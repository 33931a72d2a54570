"""Multimodal inputs between the API and the workers: families, processing in a pool of processes, feature caches.

    API: bytes of an image ──► FeatureCache (front end) ──miss──► pool process: decode, processor ──► feature file
         prompt with one placeholder per input ◄── placeholder tokens of the input ◄──┘                  (shared memory)
    AddRequest with MMInputRefs ──► core: FeatureMirror, encoder cache ──► worker: encoder ──► embeddings

Nothing here imports torch. `engine/multimodal/processors/` imports transformers, and only pool processes import that.
"""
