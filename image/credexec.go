package image

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/google/go-containerregistry/pkg/authn"
)

// providerTime bounds one run of a provider, as the kubelet does.
const providerTime = time.Minute

// How much of what a provider or a helper prints is read, in bytes, and how many
// credentials it may give.
const (
	maxPrinted    = 1 << 20
	maxComplaint  = 4 << 10
	maxAnswerAuth = 256
)

// providerAnswer is what a provider prints (credentialprovider.kubelet.k8s.io,
// CredentialProviderResponse).
type providerAnswer struct {
	APIVersion    string    `json:"apiVersion"`
	Kind          string    `json:"kind"`
	CacheKeyType  string    `json:"cacheKeyType"`
	CacheDuration *duration `json:"cacheDuration"`
	Auth          map[string]struct {
		Username string `json:"username"`
		Password string `json:"password"`
	} `json:"auth"`
}

func (a *providerAnswer) credentials() map[string]authn.AuthConfig {
	out := map[string]authn.AuthConfig{}
	for pattern, c := range a.Auth {
		out[pattern] = authn.AuthConfig{Username: c.Username, Password: c.Password}
	}
	return out
}

// parseAnswer reads an answer. No error of it holds anything of the answer, which
// is secret.
func parseAnswer(b []byte, version string) (*providerAnswer, error) {
	var a providerAnswer
	if json.Unmarshal(b, &a) != nil {
		return nil, errors.New("its answer is no CredentialProviderResponse")
	}
	switch {
	case a.Kind != "CredentialProviderResponse":
		return nil, errors.New("its answer is no CredentialProviderResponse")
	case a.APIVersion != version:
		return nil, fmt.Errorf("its answer is not of %s", version)
	case !slices.Contains([]string{"Image", "Registry", "Global"}, a.CacheKeyType):
		return nil, errors.New("its answer's cacheKeyType is not Image, Registry or Global")
	case len(a.Auth) > maxAnswerAuth:
		return nil, fmt.Errorf("its answer has %d credentials, more than %d", len(a.Auth), maxAnswerAuth)
	}
	return &a, nil
}

// runProvider asks one provider for an image.
func runProvider(ctx context.Context, v *provider, binDir, image string) (*providerAnswer, error) {
	request, err := json.Marshal(struct {
		APIVersion string `json:"apiVersion"`
		Kind       string `json:"kind"`
		Image      string `json:"image"`
	}{v.APIVersion, "CredentialProviderRequest", image})
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, providerTime)
	defer cancel()
	cmd := exec.CommandContext(ctx, filepath.Join(binDir, v.Name), v.Args...)
	withAll(cmd)
	cmd.Stdin = bytes.NewReader(request)
	out, complaint := &bounded{most: maxPrinted, stop: cancel}, &bounded{most: maxComplaint}
	cmd.Stdout, cmd.Stderr = out, complaint
	cmd.Env = cmd.Environ()
	for _, e := range v.Env {
		cmd.Env = append(cmd.Env, e.Name+"="+e.Value)
	}
	err = cmd.Run()
	switch {
	case out.over:
		return nil, fmt.Errorf("its answer has more than %d bytes", maxPrinted)
	case errors.Is(ctx.Err(), context.DeadlineExceeded):
		return nil, fmt.Errorf("no answer in %s", providerTime)
	case err != nil:
		return nil, fmt.Errorf("%w%s", err, shown(complaint.kept.String()))
	}
	return parseAnswer(out.kept.Bytes(), v.APIVersion)
}

// withAll makes a program end with all that it has started.
func withAll(cmd *exec.Cmd) {
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) }
	cmd.WaitDelay = time.Second
}

// shown gives what a program says of its failure, unless a secret could be in it.
func shown(text string) string {
	text = oneLine(text)
	low := strings.ToLower(text)
	for _, word := range []string{"secret", "password", "passwd", "token", "authorization", "credentials\":"} {
		if strings.Contains(low, word) {
			return " (what it says is not shown, it may hold a secret)"
		}
	}
	if text == "" {
		return ""
	}
	return ": " + text
}

// bounded keeps the first bytes of what is written to it.
type bounded struct {
	kept bytes.Buffer // not embedded: it would be read into past Write
	most int
	over bool
	stop func() // called when there is more; may be nil
}

func (b *bounded) Write(p []byte) (int, error) {
	n := min(len(p), b.most-b.kept.Len())
	b.kept.Write(p[:n])
	if n < len(p) && !b.over {
		b.over = true
		if b.stop != nil {
			b.stop()
		}
	}
	return len(p), nil
}
