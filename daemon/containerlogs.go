package daemon

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"sync"

	"github.com/varvefs/varve/run/monitor"
)

// containerLogs gives what writes a container's log, part by part.
func (d *Daemon) containerLogs(ctx context.Context, o ContainerLogOptions) (func(io.Writer) error, error) {
	d.mu.Lock()
	m, err := d.findContainer(o.Mount)
	d.mu.Unlock()
	if err != nil {
		return nil, err
	}
	return func(w io.Writer) error {
		p := &parts{enc: json.NewEncoder(w)}
		if rw, ok := w.(http.ResponseWriter); ok && o.Follow {
			p.flush = http.NewResponseController(rw)
			if err := p.flush.Flush(); err != nil {
				return err
			}
		}
		err := monitor.Logs(ctx, d.containerDir(m.ID), monitor.LogOptions{
			Follow: o.Follow, Tail: o.Tail, Since: o.Since, Until: o.Until, Timestamps: o.Timestamps,
			Stdout: logStream{p, false}, Stderr: logStream{p, true},
		})
		if err != nil {
			return fmt.Errorf("the log of %s: %w", m.Name, err)
		}
		return nil
	}, nil
}

// parts writes output to a client.
type parts struct {
	mu    sync.Mutex // guards enc: the streams may be written side by side
	enc   *json.Encoder
	flush *http.ResponseController // nil where nobody waits for single parts
}

type logStream struct {
	*parts
	stderr bool
}

func (s logStream) Write(b []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := s.enc.Encode(output{s.stderr, b}); err != nil {
		return 0, err
	}
	if s.flush != nil {
		return len(b), s.flush.Flush()
	}
	return len(b), nil
}
