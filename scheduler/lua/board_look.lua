-- KEYS: cluster, forced.   Returns {the cluster's report or '', the forced level or '', ms for which it is}.
return {redis.call('GET', KEYS[1]) or '', redis.call('GET', KEYS[2]) or '', redis.call('PTTL', KEYS[2])}
