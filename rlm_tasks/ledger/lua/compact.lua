-- Replace adjacent partials by one, if they are still there and tile without a gap.
-- ARGV: merged partial, "lo:hi" of each replaced partial in order.
-- Returns 1, or 0 when another caller was faster.
local f = facts()
-- While the root merge reads, partials must stay as they are.
if not f or f.state ~= 'running' then return 0 end
local lo, at
for i = 2, #ARGV do
  local from, to = string.match(ARGV[i], '^(%d+):(%d+)$')
  if (at and from ~= at) or not call('ZSCORE', pieces, ARGV[i]) then return 0 end
  lo, at = lo or from, to
end
for i = 2, #ARGV do
  call('ZREM', pieces, ARGV[i])
  call('HDEL', blobs, ARGV[i])
end
call('ZADD', pieces, lo, lo .. ':' .. at)
call('HSET', blobs, lo .. ':' .. at, ARGV[1])
return 1
