package fetch

import (
	"context"
	"sync"
	"sync/atomic"

	"golang.org/x/sync/semaphore"
)

// defaultMemory is how many bytes of frames are held in memory at a time, on their
// way from the network through decompression to the data file.
const defaultMemory = 24 << 20

// budget is memory for frames on their way. Half of it is never used but by who is
// waited for, so that nobody waits for memory that a slow fill holds.
type budget struct {
	all, others *semaphore.Weighted
	size        int64
	used, peak  atomic.Int64
	pressed     atomic.Int64 // how many wait who are to be held up by no fill and no limit, see [trip.hold]
}

func newBudget(size int64) *budget {
	size = max(size, defaultMemory) // half of it is the most that one frame takes
	return &budget{all: semaphore.NewWeighted(size), others: semaphore.NewWeighted(size / 2), size: size}
}

// take waits for n bytes. The caller calls release, once, and holds none meanwhile
// but for frames that get on without it.
func (b *budget) take(ctx context.Context, c Class, n int64) (release func(), err error) {
	n = min(n, b.size/2)
	if c != Demand {
		if err := b.others.Acquire(ctx, n); err != nil {
			return nil, err
		}
	}
	if err := b.all.Acquire(ctx, n); err != nil {
		if c != Demand {
			b.others.Release(n)
		}
		return nil, err
	}
	used := b.used.Add(n)
	for peak := b.peak.Load(); used > peak && !b.peak.CompareAndSwap(peak, used); peak = b.peak.Load() {
	}
	return func() {
		b.used.Add(-n)
		b.all.Release(n)
		if c != Demand {
			b.others.Release(n)
		}
	}, nil
}

// cores are the processors, for what is waited for first.
type cores struct {
	mu      sync.Mutex
	free    int
	waiting [classes][]chan struct{}
}

func (c *cores) take(k Class) {
	c.mu.Lock()
	if c.free > 0 {
		c.free--
		c.mu.Unlock()
		return
	}
	turn := make(chan struct{})
	c.waiting[k] = append(c.waiting[k], turn)
	c.mu.Unlock()
	<-turn
}

func (c *cores) give() {
	c.mu.Lock()
	defer c.mu.Unlock()
	for k := range c.waiting {
		if len(c.waiting[k]) > 0 {
			close(c.waiting[k][0])
			c.waiting[k] = c.waiting[k][1:]
			return
		}
	}
	c.free++
}
