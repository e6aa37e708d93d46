-- Read the histogram of an operation.  KEYS[1]: timing hash.
-- Returns {bucket, weight, ..., 'since', samples since the last reduction} in any order.
return redis.call('HGETALL', KEYS[1])
