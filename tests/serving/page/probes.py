"""Expressions that look at the page as a whole."""

DEPTH = """(() => {
  const below = (element) => 1 + Math.max(0, ...[...element.children].map(below));
  return below(document.querySelector('#thread'));
})()"""
"""Of the elements of the conversation."""

HANDLERS = """[...document.querySelectorAll('#thread *')]
  .flatMap((element) => element.getAttributeNames().filter((name) => name.startsWith('on')))"""
"""Attributes that would run something."""

FOCUS_SHOWS = """(() => {
  const focused = document.activeElement;
  if (focused === document.body) return true;
  const box = focused.id === "say" ? focused.parentElement : focused;
  const shown = focused.matches(".segments input") ? focused.nextElementSibling : box;
  const { outlineStyle, borderColor } = getComputedStyle(shown);
  const plain = getComputedStyle(document.querySelector('#new')).borderColor;
  return focused.id === 'say' ? borderColor !== plain : outlineStyle !== 'none';
})()"""
"""Whether one can see where the focus is."""

TOO_WIDE = """[...document.querySelectorAll('body *')]
  .filter((element) => !element.closest('pre, .wide, .unseen, .skip, #sidebar, dialog, svg'))
  .filter((element) => element.getBoundingClientRect().right > screen.width + 1)
  .map((element) => element.tagName + '.' + element.className)"""
"""Elements that reach over the right edge."""

SMALL_TARGETS = """[...document.querySelectorAll('button, a.plain')]
  .filter((button) => button.checkVisibility({ visibilityProperty: true }))
  .filter((button) => Math.min(button.offsetWidth, button.offsetHeight) < 24)
  .map((button) => button.outerHTML)"""
"""Buttons smaller than WCAG's 24 pixels."""

LOW_CONTRAST = """(() => {
  const canvas = Object.assign(document.createElement('canvas'), { width: 1, height: 1 });
  const context = canvas.getContext('2d', { willReadFrequently: true });
  const over = (colour, below) => {
    for (const one of [`rgb(${below.join(' ')})`, colour]) {
      context.fillStyle = one;
      context.fillRect(0, 0, 1, 1);
    }
    return [...context.getImageData(0, 0, 1, 1).data].slice(0, 3);
  };
  const behind = (element) =>
    element ? over(getComputedStyle(element).backgroundColor, behind(element.parentElement)) : [255, 255, 255];
  const linear = (value) => (value <= .04045 ? value / 12.92 : ((value + .055) / 1.055) ** 2.4);
  const light = (rgb) => {
    const [r, g, b] = rgb.map((value) => linear(value / 255));
    return .2126 * r + .7152 * g + .0722 * b;
  };
  const low = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  for (let node; (node = walker.nextNode());) {
    const element = node.parentElement;
    const unseen = element.closest('script, style, .unseen, .skip, :disabled, #toast');
    if (!node.data.trim() || unseen || !element.checkVisibility({ visibilityProperty: true })) continue;
    const below = behind(element);
    const [one, two] = [light(over(getComputedStyle(element).color, below)), light(below)];
    const contrast = (Math.max(one, two) + .05) / (Math.min(one, two) + .05);
    if (contrast < 4.5) low.push([node.data.slice(0, 40), contrast]);
  }
  return low;
})()"""
"""Texts below the contrast of 4.5 that WCAG asks for, on the colours behind them."""
