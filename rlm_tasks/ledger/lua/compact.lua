-- Replace adjacent partials by one, if they are still there and tile without a gap.
-- ARGV: merged partial, "lo:hi" of each replaced partial in order.
-- Returns 1, or 0 when another caller was faster.
local f = facts()
-- While the root merge reads, partials must stay as they are.
if not f or f.state ~= 'running' then return 0 end
local lo, at
for i = 2, #ARGV do
  local from, to = string.match(ARGV[i], '^(%d+):(%d+)$')
  if at and from ~= at then return 0 end
  lo, at = lo or from, to
end
local function each_page(work)
  for i = 2, #ARGV, PAGE do
    if not work(unpack(ARGV, i, math.min(i + PAGE - 1, #ARGV))) then return false end
  end
  return true
end
local function are_all_there(...)
  for _, score in ipairs(call('ZMSCORE', pieces, ...)) do
    if not score then return false end
  end
  return true
end
if not each_page(are_all_there) then return 0 end
-- The new one comes first, so that the keys are never empty and keep their expiry.
call('ZADD', pieces, lo, lo .. ':' .. at)
call('HSET', blobs, lo .. ':' .. at, ARGV[1])
each_page(function(...)
  call('ZREM', pieces, ...)
  return call('HDEL', blobs, ...)
end)
return 1
