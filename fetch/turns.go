package fetch

import (
	"context"
	"sync"
)

// turns lets passes that somebody waits for go before the others: while one is
// wanted, those that are not read nothing.
type turns struct {
	mu     sync.Mutex
	change *sync.Cond
	wanted map[*Pass]int
}

func newTurns() *turns {
	t := &turns{wanted: map[*Pass]int{}}
	t.change = sync.NewCond(&t.mu)
	return t
}

// want says that somebody waits for p, until done is called.
func (t *turns) want(p *Pass) (done func()) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if p.forgotten { // it is over and must not hold up others
		return func() {}
	}
	t.wanted[p]++
	t.change.Broadcast()
	return sync.OnceFunc(func() {
		t.mu.Lock()
		defer t.mu.Unlock()
		if t.wanted[p]--; t.wanted[p] <= 0 {
			delete(t.wanted, p)
			t.change.Broadcast()
		}
	})
}

// forget says that p is over, whoever still waits for it.
func (t *turns) forget(p *Pass) {
	t.mu.Lock()
	defer t.mu.Unlock()
	p.forgotten = true
	delete(t.wanted, p)
	t.change.Broadcast()
}

// wait returns when it is p's turn, or ctx is over.
func (t *turns) wait(ctx context.Context, p *Pass) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if len(t.wanted) == 0 || t.wanted[p] > 0 {
		return
	}
	stop := context.AfterFunc(ctx, func() {
		t.mu.Lock()
		defer t.mu.Unlock()
		t.change.Broadcast()
	})
	defer stop()
	for len(t.wanted) > 0 && t.wanted[p] == 0 && ctx.Err() == nil {
		t.change.Wait()
	}
}
