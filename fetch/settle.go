package fetch

import (
	"context"
	"time"
)

// Settle waits until a layer that is whole has been compared with the index which
// others made of it, if that has begun, and gives what was found wrong.
func (l *Layer) Settle(ctx context.Context) error {
	const often = 20 * time.Millisecond
	for {
		l.mu.Lock() // what brought the last frame has begun it before it lets go
		busy := l.About().Unproven && l.proving.Load() && l.ctx.Err() == nil
		l.mu.Unlock()
		if wrong := l.wrong.Load(); wrong != nil {
			return *wrong
		}
		if !busy {
			return nil
		}
		select {
		case <-time.After(often):
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}
