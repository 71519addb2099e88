package identity

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/casbin/casbin/v2"
	"github.com/hashicorp/go-hclog"
)

// PolicyConfig says where a policy is.
type PolicyConfig struct {
	// ModelFile is a Casbin model; empty means BuiltinModel.
	ModelFile string
	// PolicyFile holds the rules. Required.
	PolicyFile string
	// Interval is how often Run looks at the files. Default 2 s.
	Interval time.Duration
	// Logger gets decisions at debug, denials and reloads. Default: none.
	Logger hclog.Logger
}

// Policy decides who may do what: deny by default, and a rule that denies wins
// over all that allow. docs/security.md explains the file. All methods are safe
// for concurrent use.
type Policy struct {
	cfg     PolicyConfig
	logger  hclog.Logger
	state   atomic.Pointer[policyState]
	denials denialLog
	// counts are decisions by action, and by whether it was allowed.
	counts [otherAction + 1][2]atomic.Uint64

	reloading sync.Mutex
	// seen is what the files held when they were last looked at by Run, refused
	// what of theirs did not do.
	seen, refused     contentSum    // guarded by reloading
	reloads, failures atomic.Uint64 // of Reload
	isRefused         atomic.Bool
}

// policyState is one policy in force, with what it has decided: a decision of
// an old policy can never be taken for one of the new.
type policyState struct {
	set      *ruleSet
	shape    shape
	roles    *roleGraph
	enforcer *casbin.Enforcer
	cache    decisionCache
	loaded   time.Time
	sum      contentSum
}

// contentSum tells apart what files hold.
type contentSum [sha256.Size]byte

// OpenPolicy reads a policy. The error names the file, the lines and what is
// wrong with them: it is a *PolicyError unless the file cannot be read.
func OpenPolicy(cfg PolicyConfig) (*Policy, error) {
	if cfg.PolicyFile == "" {
		return nil, errors.New("no policy file is named")
	}
	if cfg.Interval <= 0 {
		cfg.Interval = 2 * time.Second
	}
	if cfg.Logger == nil {
		cfg.Logger = hclog.NewNullLogger()
	}
	text, err := readPolicyFiles(cfg)
	if err != nil {
		return nil, err
	}
	state, err := text.load(cfg)
	if err != nil {
		return nil, err
	}
	p := &Policy{cfg: cfg, logger: cfg.Logger, denials: denialLog{logger: cfg.Logger, now: time.Now}}
	p.state.Store(state)
	p.seen = state.sum
	return p, nil
}

// policyText is what the files hold.
type policyText struct{ model, policy []byte }

func readPolicyFiles(cfg PolicyConfig) (t policyText, err error) {
	t.model = []byte(BuiltinModel)
	if cfg.ModelFile != "" {
		if t.model, err = readAtMost(cfg.ModelFile, maxModelBytes); err != nil {
			return policyText{}, fmt.Errorf("read the policy's model: %w", err)
		}
	}
	if t.policy, err = readAtMost(cfg.PolicyFile, maxPolicyBytes); err != nil {
		return policyText{}, fmt.Errorf("read the policy: %w", err)
	}
	return t, nil
}

// readAtMost reads a file that has to be small, and one byte more of one that
// is not, for whoever judges it.
func readAtMost(name string, limit int64) (text []byte, err error) {
	f, err := os.Open(name)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	// A pipe or a device would have us wait for ever.
	if info, err := f.Stat(); err != nil {
		return nil, err
	} else if !info.Mode().IsRegular() {
		return nil, fmt.Errorf("%s is not a file", name)
	}
	return io.ReadAll(io.LimitReader(f, limit+1))
}

func (t policyText) sum() contentSum {
	h := sha256.New()
	_, _ = fmt.Fprintf(h, "%d\n%s%s", len(t.model), t.model, t.policy) // a hash takes everything
	return contentSum(h.Sum(nil))
}

func (t policyText) load(cfg PolicyConfig) (*policyState, error) {
	modelName := cfg.ModelFile
	if modelName == "" {
		modelName = "the built-in model"
	}
	if len(t.model) > maxModelBytes {
		return nil, modelError(modelName, "The file has more than 64 KiB.")
	}
	m, s, err := loadModel(modelName, string(t.model))
	if err != nil {
		return nil, err
	}
	if cfg.ModelFile == "" {
		s = builtinShape
	}
	set, err := parsePolicy(cfg.PolicyFile, t.policy, s)
	if err != nil {
		return nil, err
	}
	roles := &roleGraph{links: set.links}
	enforcer, err := newEnforcer(m, set, roles, s)
	if err != nil {
		return nil, modelError(modelName, fmt.Sprintf("It does not work with %s: %v.", cfg.PolicyFile, err))
	}
	return &policyState{set: set, shape: s, roles: roles, enforcer: enforcer, loaded: time.Now(), sum: t.sum()}, nil
}

// Places in Policy.counts: those of actions, and one for whatever else.
const otherAction = 4

func knownAction(action string) int {
	switch action {
	case ActionProduce:
		return 0
	case ActionConsume:
		return 1
	case ActionMonitor:
		return 2
	case ActionAdmin:
		return 3
	}
	return otherAction
}

// Allow decides whether subject may do action with the log named object. It
// remembers what it decided until the policy changes. What the policy cannot
// decide is denied.
func (p *Policy) Allow(subject, object, action string) bool {
	st := p.state.Load()
	key := decisionKey{subject, object, action}
	allowed := p.decided(st, key)
	p.count(key, allowed)
	if !allowed {
		p.denials.note(key, func() string { return st.explain(key).Text })
	}
	if p.logger.IsDebug() {
		p.logger.Debug("decided", "subject", clean(subject), "object", clean(object), "action", clean(action), "allowed", allowed)
	}
	return allowed
}

// Would tells what Allow would, for somebody who wants to know and nothing else:
// it is neither counted nor logged.
func (p *Policy) Would(subject, object, action string) bool {
	return p.decided(p.state.Load(), decisionKey{subject, object, action})
}

func (p *Policy) decided(st *policyState, key decisionKey) bool {
	allowed, known := st.cache.get(key)
	if !known {
		allowed = p.decide(st, key)
	}
	return allowed
}

func (p *Policy) count(k decisionKey, allowed bool) {
	result := 0
	if allowed {
		result = 1
	}
	p.counts[knownAction(k.action)][result].Add(1)
}

// decide asks Casbin, and remembers the answer.
func (p *Policy) decide(st *policyState, k decisionKey) bool {
	if st.unaskable(k) != "" {
		return false
	}
	allowed, err := st.enforcer.Enforce(k.subject, k.object, k.action)
	if err != nil {
		// The denial's line, which follows, says why.
		return false
	}
	st.cache.put(k, allowed)
	return allowed
}

// unaskable says why a question is denied without asking the rules.
func (st *policyState) unaskable(k decisionKey) string {
	switch {
	case k.subject == "":
		return "denied: nobody is named"
	case strings.HasPrefix(k.subject, rolePrefix):
		return "denied: the subject looks like a role, and a certificate is none"
	case len(k.subject) > maxNameBytes || len(k.object) > maxNameBytes || len(k.action) > maxNameBytes:
		return fmt.Sprintf("denied: a name has more than %d bytes", maxNameBytes)
	case st.shape.builtin && knownAction(k.action) == otherAction:
		return "denied: there is no such action; there are " + strings.Join(actions, ", ")
	}
	return ""
}

// Reload reads the files again, at once. Where they do not hold a good policy,
// the old one stays in force; that is logged, once for as long as the files are
// the same, and returned.
func (p *Policy) Reload() error {
	p.reloading.Lock()
	defer p.reloading.Unlock()
	text, err := readPolicyFiles(p.cfg)
	return p.apply(text, err)
}

// apply puts into force what was read. Called with reloading held.
func (p *Policy) apply(text policyText, err error) error {
	var state *policyState
	if err == nil {
		state, err = text.load(p.cfg)
	}
	if err != nil {
		p.failures.Add(1)
		p.isRefused.Store(true)
		if sum := failureSum(text, err); sum != p.refused {
			p.refused = sum
			p.logger.Error("the policy is not changed, because the files have errors; the old one stays in force", "error", err)
		}
		return err
	}
	old := p.state.Swap(state)
	p.reloads.Add(1)
	p.refused = contentSum{}
	p.isRefused.Store(false)
	p.logger.Info("policy loaded", "file", p.cfg.PolicyFile, "rules", len(state.set.rules), "changed", old.sum != state.sum)
	return nil
}

// failureSum tells apart what did not do: the same text, or the same reason for
// which there is none.
func failureSum(text policyText, err error) contentSum {
	if text.policy == nil {
		return sha256.Sum256([]byte("unreadable: " + err.Error()))
	}
	return text.sum()
}

// Run looks at the files until ctx ends, and reloads when they have changed.
// Whoever calls it waits for it.
func (p *Policy) Run(ctx context.Context) {
	ticker := time.NewTicker(p.cfg.Interval)
	defer ticker.Stop()
	for {
		select {
		case <-ctx.Done():
			p.denials.flush()
			return
		case <-ticker.C:
			p.poll()
			p.denials.flush()
		}
	}
}

// poll reloads if the files have changed and have come to rest: two looks have
// to see the same. Half a policy can be a good one, without the rules that deny.
func (p *Policy) poll() {
	p.reloading.Lock()
	defer p.reloading.Unlock()
	text, err := readPolicyFiles(p.cfg)
	sum := text.sum()
	if err != nil {
		sum = failureSum(policyText{}, err)
	}
	rested := sum == p.seen
	p.seen = sum
	if !rested || sum == p.refused {
		return
	}
	if err == nil && sum == p.state.Load().sum {
		// Also where what was refused is gone again.
		p.refused = contentSum{}
		p.isRefused.Store(false)
		return
	}
	// apply has said what there is to say.
	_ = p.apply(text, err)
}

// PolicyStats is what a Policy has done since it was opened.
type PolicyStats struct {
	// Decisions are by action; "other" stands for all that is no action.
	Decisions []DecisionCount
	// Rules is how many are in force, Roles how many lines say who has one.
	Rules, Roles int
	// Loaded is when the policy in force was read.
	Loaded time.Time
	// Reloads and ReloadFailures are changes of the policy and files that were
	// refused.
	Reloads, ReloadFailures uint64
	// Refused: the files hold something else than the policy in force, because
	// it has errors.
	Refused bool
}

// DecisionCount is how often an action was allowed and denied.
type DecisionCount struct {
	Action          string
	Allowed, Denied uint64
}

// Stats returns what there is to count. It may be a moment apart in itself.
func (p *Policy) Stats() PolicyStats {
	st := p.state.Load()
	s := PolicyStats{
		Rules: len(st.set.rules), Roles: len(st.set.links), Loaded: st.loaded,
		Reloads: p.reloads.Load(), ReloadFailures: p.failures.Load(), Refused: p.isRefused.Load(),
	}
	for i := range p.counts {
		action := "other"
		if i < len(actions) {
			action = actions[i]
		}
		s.Decisions = append(s.Decisions, DecisionCount{Action: action, Denied: p.counts[i][0].Load(), Allowed: p.counts[i][1].Load()})
	}
	return s
}
