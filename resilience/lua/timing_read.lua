-- Return the histogram of an operation in any order: {bucket, weight, ..., 'since', samples since it last faded}.
-- KEYS[1]: timing hash.
return redis.call('HGETALL', KEYS[1])
