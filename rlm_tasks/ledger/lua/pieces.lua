-- Read partials in item order.  ARGV: from, to, largest number, largest bytes.
-- Returns {"lo:hi", packed, "lo:hi", packed, ...}: fewer when they are large, at least one.
local found = call('ZRANGEBYSCORE', pieces, ARGV[1], '(' .. ARGV[2], 'LIMIT', 0, ARGV[3])
local answer, bytes, at, some = {}, 0, 1, 1
while at <= #found and bytes < tonumber(ARGV[4]) do
  local last = math.min(at + some - 1, #found)
  for i, packed in ipairs(call('HMGET', blobs, unpack(found, at, last))) do
    answer[#answer + 1] = found[at + i - 1]
    answer[#answer + 1] = packed or ''
    bytes = bytes + #(packed or '')
  end
  at, some = last + 1, 4 * some
end
return answer
