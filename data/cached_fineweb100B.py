"""Fetches FineWeb in GPT-2 tokens from the hub (dataset kjj0/fineweb100B-gpt2) into data/fineweb100B/.

    python data/cached_fineweb100B.py 200                     the val shard and the first 200 of 1030 train shards
    python data/cached_fineweb100B.py                         all of them, about 200 GB

Everything else is as in cached_fineweb10B.py, which does the work.
"""

from cached_fineweb10B import leave, main

if __name__ == "__main__":
    leave(main("fineweb100B", "kjj0/fineweb100B-gpt2", 1030, __doc__))
